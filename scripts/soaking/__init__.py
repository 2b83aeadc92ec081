"""What soak.py needs: starting and killing, and comparing what runs end with."""
