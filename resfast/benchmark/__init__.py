"""Measuring resfast beside what people would run instead: `resfast bench` and bench/ share it.

`timing` races contenders, `peers` builds them, `work` says what is measured, `stages` lists the
ops at a ResNet's shapes, `floor` measures the machine's limits, `memory` counts bytes, `report`
draws tables and pictures.
"""
