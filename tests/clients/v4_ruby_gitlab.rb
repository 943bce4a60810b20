#!/usr/bin/env ruby
# frozen_string_literal: true

# Drives Debian's Ruby client (gem gitlab 4.17) with API v4 against tests/backend/gitlab.ru, directly or behind tollgate.
# Usage: ruby v4_ruby_gitlab.rb BASE_URL GOOD_TOKEN BAD_TOKEN

require 'gitlab'
require 'tempfile'

CHECKS = 11
TITLE = 'Überprüfung: 日本語 🚀 a&b=c+d; 100%'

abort "usage: #{$PROGRAM_NAME} BASE_URL GOOD_TOKEN BAD_TOKEN" unless ARGV.size == 3
base_url, good_token, bad_token = ARGV

$passed = 0

def check(name)
  yield
  $passed += 1
  puts "ok #{name}"
rescue StandardError => e
  abort "not ok #{name}: #{e.class}: #{e.message}"
end

def equal(expected, actual)
  raise "expected #{expected.inspect[0, 300]}, got #{actual.inspect[0, 300]}" unless expected == actual
end

def refused(error_class, part)
  yield
rescue error_class => e
  raise "#{part.inspect} is not in #{e.message.inspect}" unless e.message.include?(part)
else
  raise "expected #{error_class}, got an answer"
end

connect = ->(token) { Gitlab.client(endpoint: "#{base_url}/api/v4", private_token: token) }
client = connect.call(good_token)
all_ids = (1..253).to_a
keyset = { pagination: 'keyset', order_by: 'id', sort: 'asc' }

check('user') { equal('alice', client.user.username) }
check('list has 20 projects') { equal((1..20).to_a, client.projects.map(&:id)) }
check('auto_paginate reaches all projects') do
  equal(all_ids, client.projects(per_page: 100).auto_paginate.map(&:id))
end
check('keyset reaches all projects') do
  equal(all_ids, client.projects(per_page: 100, **keyset).auto_paginate.map(&:id))
end
check('keyset with 5000 gives 100') { equal((1..100).to_a, client.projects(per_page: 5000, **keyset).map(&:id)) }
check('get by encoded path with a dot') { equal(2, client.project('group/dotted.name').id) }
check('create an issue with a UTF-8 title') do
  created = client.create_issue('group/project', TITLE, description: TITLE)
  equal([TITLE, TITLE], [created.title, created.description])
end
check('upload a file') do
  Tempfile.create('upload') do |file|
    file.write(TITLE)
    file.flush
    equal(File.basename(file.path), client.upload_file(1, file.path).alt)
  end
end
check('404 is NotFound') { refused(Gitlab::Error::NotFound, '404 Project Not Found') { client.project('group/none') } }
check('403 is Forbidden') { refused(Gitlab::Error::Forbidden, '403 Forbidden') { client.delete_project(1) } }
check('bad token is Unauthorized') do
  refused(Gitlab::Error::Unauthorized, '401 Unauthorized') { connect.call(bad_token).projects }
end

abort "ran #{$passed} checks, not #{CHECKS}" unless $passed == CHECKS
puts "#{$passed} checks passed"
