"""The languages of the compiler: values with a printed form and a verify(), no text and no memory."""
