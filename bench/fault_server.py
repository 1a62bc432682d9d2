"""Imported by the fork server alone: what every rank of a trial needs, loaded and compiled once.

A rank forked from here starts in hundredths of a second instead of seconds.
"""

from bench.fault_ranks import warm

warm()
