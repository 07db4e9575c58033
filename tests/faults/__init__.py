"""The fault suite: what happens to inputs, disks and processes, and what the package must do then.

A group is a module ``group_<number>_<name>.py`` with a list ``ROWS`` of `tests.faults.runner.Row`. pytest runs each row
as a test (`test_faults.py`; slow ones carry the mark ``slow``, long ones are left out); ``make faults``
(``python -m tests.faults``) runs all of them in full and writes docs/faults.md.
"""
