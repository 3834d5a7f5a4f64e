"""Runs as pages: one run (``report.html``), or several beside each other.

``axes`` and ``charts`` make SVG of numbers; ``curves`` says which charts a run has; ``words`` and ``page`` say the
rest; ``writer`` writes the page while a run goes. None of them imports torch.
"""
