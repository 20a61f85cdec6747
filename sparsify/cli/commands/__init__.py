"""The commands of the command line beside those that run a model through Lightning."""
