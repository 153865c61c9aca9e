"""Operations between ranks; they know torch and each other."""
