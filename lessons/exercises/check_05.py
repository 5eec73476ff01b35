"""Grade the exercises of lesson 05: python lessons/exercises/check_05.py [FILE]

The tests of each step are in steps_05.py.
"""

import sys

from sandbox import main

if __name__ == "__main__":
    sys.exit(main("05_planning.py"))
