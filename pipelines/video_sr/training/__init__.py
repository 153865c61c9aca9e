"""What STAR's training needs: bad clips from good ones, and the loss."""
