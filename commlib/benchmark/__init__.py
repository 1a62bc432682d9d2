"""`commlib bench`: collectives and codecs, timed side by side, written down as rows.

units.py reads sizes, timing.py turns clocks into numbers, rows.py is the schema, collectives.py and
codecs.py measure, peers.py are other people's codecs.
"""
