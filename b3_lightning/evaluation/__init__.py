"""Benchmarks: files in, vectors of each distinct item once, figures with every query's share in them.

``suites`` lists what there is; a suite reads an ``EvalSet``, whose tasks score vectors; ``run`` goes through the sets
and keeps finished ones; ``results`` makes one file of them, ``bootstrap`` compares two.
"""
