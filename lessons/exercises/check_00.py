"""Grade the exercises of lesson 00: python lessons/exercises/check_00.py [FILE]

The tests of each step are in steps_00.py.
"""

import sys

from sandbox import main

if __name__ == "__main__":
    sys.exit(main("00_gpt.py"))
