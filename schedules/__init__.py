if __name__ != "luthier.schedules":
    raise ImportError("import luthier.schedules; the folder 'schedules' is not a package of its own")
