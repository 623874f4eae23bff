"""The JavaScript of a web package that does not depend on the model: data, copied by ``luthier.backends.web_package``."""
