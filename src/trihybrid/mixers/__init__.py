"""Mixers: modules that mix over time, behind one contract (`trihybrid.mixers.contract`)."""
