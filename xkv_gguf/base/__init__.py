"""What every room uses: files, plain tables, an interrupted run's finished parts."""
