"""One file for each upcycling method, over what base.py says a method is."""
