if __name__ != "luthier.tuner":
    raise ImportError("import luthier.tuner; the folder 'tuner' is not a package of its own")
