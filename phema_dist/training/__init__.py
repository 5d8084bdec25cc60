"""What runs beside a training loop: which parameters a rank owns, their averages, and the threads that store them."""
