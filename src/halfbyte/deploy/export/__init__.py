"""A run, or a model, in the form that another program opens; see :mod:`halfbyte.deploy.export.exporting`."""
