"""One backend a file; what is in a record stands in :mod:`luthier.codegen.targets.backend`."""
