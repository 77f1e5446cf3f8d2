"""See README.md for the map of the packages."""
