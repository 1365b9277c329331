"""What is deployed and where it answers: sites, and the services of the embedded one."""
