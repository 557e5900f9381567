"""What tests of several floors are made with: loops, sweeps, links, pools, a site."""
