if __name__ != "luthier.passes":
    raise ImportError("import luthier.passes; the folder 'passes' is not a package of its own")
