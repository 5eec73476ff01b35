"""Grade the exercises of lesson 04: python lessons/exercises/check_04.py [FILE]

The tests of each step are in steps_04.py.
"""

import sys

from sandbox import main

if __name__ == "__main__":
    sys.exit(main("04_scaling.py"))
