"""Pure rules: no I/O, no clock, no logger. Everything here can be called with values alone."""
