"""What stands in place of other libraries' names while halfbyte is installed: see :mod:`halfbyte.hf.install`."""
