"""``python -m emp_fast`` is ``emp-fast``."""

from emp_fast.cli import main

if __name__ == "__main__":
    main()
