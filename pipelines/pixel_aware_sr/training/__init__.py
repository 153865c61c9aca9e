"""What PASD's training needs: bad pictures from good ones, and the losses."""
