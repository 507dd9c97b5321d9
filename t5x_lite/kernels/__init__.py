"""Attention kernels of one signature: `plain` on any machine, `flash` on TPUs."""
