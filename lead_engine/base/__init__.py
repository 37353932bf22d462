"""What every room uses: errors, files, fingerprints of contents, statistics, terminal output."""
