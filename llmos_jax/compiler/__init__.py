"""Programs: what reaches a device, compiled beforehand."""
