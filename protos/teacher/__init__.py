"""Protocol buffer packages of the teacher service."""
