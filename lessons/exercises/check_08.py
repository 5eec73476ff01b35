"""Grade the exercises of lesson 08: python lessons/exercises/check_08.py [FILE]

The tests of each step are in steps_08.py.
"""

import sys

from sandbox import main

if __name__ == "__main__":
    sys.exit(main("08_serving.py"))
