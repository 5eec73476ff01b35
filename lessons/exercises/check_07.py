"""Grade the exercises of lesson 07: python lessons/exercises/check_07.py [FILE]

The tests of each step are in steps_07.py.
"""

import sys

from sandbox import main

if __name__ == "__main__":
    sys.exit(main("07_adapt.py"))
