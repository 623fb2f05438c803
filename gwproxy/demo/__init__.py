"""The built-in upstream: a small AI gateway on loopback with scripted faults, used to try the proxy
out and to judge it in tests. It imports nothing from the rest of the package: an oracle that shares
code with what it judges proves nothing.
"""

from .cli import main
from .server import DemoUpstream

__all__ = ["DemoUpstream", "main"]
