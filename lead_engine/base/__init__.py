"""What every room uses: errors, files, fingerprints of contents, terminal output, YAML."""
