"""Who is who: certificate authorities, enrolment, access tokens, and TLS on every listener."""
