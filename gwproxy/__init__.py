"""gwproxy: an edge proxy in front of an AI gateway, with exact budgets and untouched streams."""

__version__ = "0.1.0"
