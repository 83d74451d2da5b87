"""What runs: the operator, its prelude, and the building and loading of generated packages."""
