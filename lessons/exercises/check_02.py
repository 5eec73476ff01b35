"""Grade the exercises of lesson 02: python lessons/exercises/check_02.py [FILE]

The tests of each step are in steps_02.py.
"""

import sys

from sandbox import main

if __name__ == "__main__":
    sys.exit(main("02_mixture_of_experts.py"))
