"""Models in the hands of users: whole while they are lent, and refused in words afterwards."""
