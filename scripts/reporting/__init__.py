"""What scripts/report.py is made of: ``runs`` reads run folders, ``groups`` sorts them, ``statistics`` knows how sure a mean is,
``tables`` and ``text`` write, ``weights`` finds histograms, ``pictures`` draws."""
