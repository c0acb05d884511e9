"""One life of one Redis as the one that is written to, as scripts there find it out.

It ends with a restart, and with a promotion: whatever Redis says of an earlier one may be less than
somebody was told. Without the second half of it, a master that was demoted with a change less than
its follower and later promoted again would be believed.
"""

__all__ = ["EPOCH"]

EPOCH = """
local function epoch()
  local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  local line = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
  return (run or '') .. ':' .. (line or '')
end
"""
