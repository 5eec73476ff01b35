"""Grade the exercises of lesson 03: python lessons/exercises/check_03.py [FILE]

The tests of each step are in steps_03.py.
"""

import sys

from sandbox import main

if __name__ == "__main__":
    sys.exit(main("03_multimodal.py"))
