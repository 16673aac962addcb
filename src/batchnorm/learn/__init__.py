"""The lesson: batch norm step by step with real numbers, as plain data and for the terminal.

The steps are tables of formulas and code (`recipes`); their numbers come from running that code.
Other layers than batch norm, and checks of other people's code, do not belong here.
"""
