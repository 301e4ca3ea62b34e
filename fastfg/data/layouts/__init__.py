"""The layouts of published data sets, one file per data set."""
