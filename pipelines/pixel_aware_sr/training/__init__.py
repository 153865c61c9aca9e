"""What PASD's training needs: bad images from good ones, and the losses."""
