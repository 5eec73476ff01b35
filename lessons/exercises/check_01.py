"""Grade the exercises of lesson 01: python lessons/exercises/check_01.py [FILE]

The tests of each step are in steps_01.py.
"""

import sys

from sandbox import main

if __name__ == "__main__":
    sys.exit(main("01_sparse_attention.py"))
