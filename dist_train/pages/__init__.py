"""Pages of one file that open from a disk: HTML with tables, curves and pictures, and no network."""
