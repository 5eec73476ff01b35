"""Grade the exercises of lesson 06: python lessons/exercises/check_06.py [FILE]

The tests of each step are in steps_06.py.
"""

import sys

from sandbox import main

if __name__ == "__main__":
    sys.exit(main("06_compression.py"))
