"""The data doctor: duplicates, leaks and label issues of a data set."""

from convlens.audit.audit import AuditReport, LabelIssue, audit, write_exclude_file, write_report

__all__ = ["AuditReport", "LabelIssue", "audit", "write_exclude_file", "write_report"]
