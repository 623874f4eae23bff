if __name__ != "luthier.codegen":
    raise ImportError("import luthier.codegen; the folder 'codegen' is not a package of its own")
